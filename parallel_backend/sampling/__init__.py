"""Schedules, samplers and guidance; nothing here knows how a model is spread."""
