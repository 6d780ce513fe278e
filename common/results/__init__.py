"""What looks at results: pictures, tables, the report, benchmarks, masks of other images."""
