"""What a finished run says: statistics, plots, an HTML page and a Markdown page."""
