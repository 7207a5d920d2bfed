"""What a run will take, found out before renting anything."""
