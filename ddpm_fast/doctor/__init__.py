"""What of ddpm_fast works on this machine, tried piece by piece, and what mends the rest."""
