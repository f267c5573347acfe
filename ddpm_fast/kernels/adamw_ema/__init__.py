"""AdamW and its averages in three launches."""
