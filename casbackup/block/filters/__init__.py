"""Filters: devices that stand on another device, in any order and number, and know of no job.

A filter takes over the device below and closes it with itself. It may assume valid calls, as every device,
and makes only valid ones: whoever opens the stack puts one ``Guarded`` on top of it. What a filter raises of
its own is said in its docstring; all else comes from below unchanged.
"""
