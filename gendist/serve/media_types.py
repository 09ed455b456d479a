"""What the formats of requests and answers are called in HTTP."""

JSON = "application/json"
NPY = "application/x-npy"
NPZ = "application/x-npz"
ARROW = "application/vnd.apache.arrow.stream"
ARROW_FILE = "application/vnd.apache.arrow.file"  # of requests alone
NDJSON = "application/x-ndjson"
PNG = "image/png"

MEDIA_TYPES = {"json": JSON, "npy": NPY, "npz": NPZ, "arrow": ARROW, "ndjson": NDJSON, "png": PNG}
"""Of answers, by the name of the format."""
