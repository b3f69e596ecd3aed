"""Model, trees, tracing, sites, rewrite: what every room stands on."""
