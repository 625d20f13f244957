"""What users ask for: backup, restore, diff. Data moves through a ``Peer`` only."""
