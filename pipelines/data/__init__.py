"""Images: sources, packed files, decoding, duplicates, downloads and archives."""
