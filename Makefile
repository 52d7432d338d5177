.PHONY: demo test check install clean

demo: install  ## build a bundle from the small trained model, render it, print the table
	.venv/bin/meancache-trt demo -o demo

test: check  ## everything that CI runs
	scripts/test

check:
	scripts/check

install:
	scripts/install

clean:
	rm -rf .venv demo build dist
