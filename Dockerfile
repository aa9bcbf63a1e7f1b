# srmu with its Python, for a CPU or a GPU; docs/platforms.md says how to build and run it.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim

# which of PyTorch's wheel indexes to take torch from: cpu, or that of a release of CUDA
ARG DEVICE=cpu

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

# From what changes least to what changes most: torch, the other libraries, srmu.
WORKDIR /opt/srmu
COPY constraints.txt .
RUN pip install -c constraints.txt torch \
    --index-url "https://download.pytorch.org/whl/${DEVICE}" --extra-index-url https://pypi.org/simple

COPY pyproject.toml .
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
extras = project['optional-dependencies']; print(*project['dependencies'], *extras['real'], *extras['sign'], sep='\n')" \
    > requirements.txt \
    && pip install -c constraints.txt -r requirements.txt

COPY . .
RUN pip install --no-deps .

# Home and caches of whichever user it runs as (docker run --user) are in /cache, the user's files in /work.
RUN useradd --no-create-home srmu && mkdir -m 1777 /cache /work
ENV HOME=/cache USER=srmu
USER srmu
WORKDIR /work
ENTRYPOINT ["srmu"]
CMD ["--help"]
