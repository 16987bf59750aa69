"""From a configuration to an engine: the plan, the loading, the first compilation."""
