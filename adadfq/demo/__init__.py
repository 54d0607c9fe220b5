"""``adadfq demo``: a small teacher for scikit-learn's handwritten digits, quantised without their images."""
