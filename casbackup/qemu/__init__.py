"""Running QEMUs: control through QMP, and their disks as sources of live backups."""
