"""What pages of one file share: markup, style sheet, charts, pictures. Pages: ingest/inspect.py, eval/report.py."""
