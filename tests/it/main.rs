//! Integration tests: one binary, one module a topic. They run against real servers and fail without them.
