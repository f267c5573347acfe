"""How training scales: measured, explained by a model, and predicted beyond the machine."""
