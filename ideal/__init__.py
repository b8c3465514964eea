"""IDEAL: how much of each SFT data set to train on (arXiv 2505.12762)."""
