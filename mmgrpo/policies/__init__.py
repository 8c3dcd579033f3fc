"""Policies: a model folder becomes log-probabilities of decisions, one file per modality."""
