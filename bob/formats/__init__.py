"""What lies on disk: one reader and one writer side by side, and where each file is."""
