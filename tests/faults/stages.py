"""The stages of a checkpoint at which its writer is killed."""

# What the writer of a checkpoint is about to do, as an audit event, and to what.
WRITER_STAGES = (
    ("os.mkdir", ".step_*.tmp"),
    ("open", ".step_*.tmp/model.safetensors"),
    ("open", ".step_*.tmp/ema.safetensors"),
    ("open", ".step_*.tmp/manifest.json"),
    ("os.rename", ".step_*.tmp"),
    ("shutil.rmtree", "step_*"),  # one that is no longer kept
)
