"""A study as one HTML page that needs nothing else: tables, figures, routed texts, costs."""
