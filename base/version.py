"""Version strings: what Firecracker's clients expect to read, and our own beside it."""

#: Version that GET /version, GET / and ``--version`` report, so that clients take the features for granted that exist.
FIRECRACKER_VERSION = "1.17.0-dev"
APP_NAME = "Firecracker"
#: Version of the snapshot data format that ``--snapshot-version`` reports.
SNAPSHOT_VERSION = "11.0.0"

PRODUCT_NAME = "Cellblock"
CELLBLOCK_VERSION = "0.1.0"
