"""Policies: what turns a model folder into log-probabilities of decisions, one file per modality."""
