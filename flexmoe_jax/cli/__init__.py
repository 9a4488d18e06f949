"""The command line: `flexmoe VERB ...`. The only room that parses arguments and prints."""
