"""Labelled datasets for classification pre-training: `builder classes`. See ../CLASSES.md."""
