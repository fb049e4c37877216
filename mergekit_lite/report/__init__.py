"""What a checkpoint is, what numbers it holds, how two differ, whether one is sound: as data. Reads, never writes."""
