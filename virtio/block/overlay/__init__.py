"""Copy-on-write: a read-only base that many machines share, and a sparse file with what one machine has changed."""
