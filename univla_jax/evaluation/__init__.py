"""Scores: closed-loop rollouts, offline errors and reports."""
