"""What other schedulers run: scripts and manifests that call `builder work`. See FARM.md."""
