"""Robot datasets: description, readers, validation, and the token store."""
