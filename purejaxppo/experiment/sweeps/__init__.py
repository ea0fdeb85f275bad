"""Many runs: a sweep as data, its plan, running it, its result, and searches."""
