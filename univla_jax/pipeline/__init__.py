"""Input pipeline: from token stores and tasks to global batches."""
