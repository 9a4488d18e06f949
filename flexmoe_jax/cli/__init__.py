"""The command line: the only place for flags, ConfigDicts and print. Floor 5."""
