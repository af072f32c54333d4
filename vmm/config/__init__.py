"""What clients configure before the start, a module per family of devices: record, shape of the body, rules, store."""
