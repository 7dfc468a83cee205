"""From a completion's text to a number: the `exact` verifier, functions of your own, and what a faulty one costs."""
