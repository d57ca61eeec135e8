"""The OpenFlow controller of Bulkhead: model, pipeline, reconciler, event log and command line."""
