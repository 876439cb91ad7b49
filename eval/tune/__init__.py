"""Search for the settings that keep least at a given loss."""
