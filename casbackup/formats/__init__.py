"""Archive formats: one file or stream that holds all disks of a VM, their configs, and perhaps its state."""
