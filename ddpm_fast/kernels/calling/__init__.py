"""Which implementation runs, and what every op's launch asks first: device, arguments, autocast."""
