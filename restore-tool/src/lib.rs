//! restore-tool.
