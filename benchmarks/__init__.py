"""Side by side with torch and transformers, and with the machine's own limits: `make bench`."""
