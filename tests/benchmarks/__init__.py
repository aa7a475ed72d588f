"""Ratios against a peer or a naive version in the same run; nothing here is asserted."""
