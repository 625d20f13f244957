"""Steps of an imaginary format that keeps an inventory: enough to try the machinery of migrations.

Format 1: ``inventory/NAME.txt`` with ``key=value`` lines. Format 2: ``inventory/NAME.json`` instead.
Format 3: ``shelves/N/NAME.json``, N being the first letter, and no ``inventory``; compression level 5.
"""
