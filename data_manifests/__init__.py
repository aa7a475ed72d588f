"""Facts about public datasets as TOML and CSV files: layout, expected counts, licence, citation."""
