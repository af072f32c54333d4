"""JSON as clients of Firecracker know it: a decoder and typed shapes with serde's words. Nothing of HTTP."""
