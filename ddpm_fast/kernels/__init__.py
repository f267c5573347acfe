"""One file per fused op: its maths, its plain-torch reference, its launch."""
