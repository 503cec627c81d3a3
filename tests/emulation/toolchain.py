"""From CUDA sources to one shared library that runs on the CPU: nvcc's PTX, translated, with nvcc's own host objects."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from emulation import arithmetic, machine, ptx  # arithmetic and machine register the instructions
from emulation.translate import Translation

__all__ = ["arithmetic", "build", "machine", "reasons_against", "sanitizer_environment"]

RUNTIME = Path(__file__).parent / "runtime"
# -fwrapv: integers of PTX wrap. -ffp-contract: a product and a sum are two roundings. AVX2, FMA and F16C: __builtin_fmaf, _Float16.
CXX_FLAGS = (
    "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fwrapv", "-fno-strict-aliasing", "-ffp-contract=off",
    "-mavx2", "-mfma", "-mf16c", "-g1",
)  # fmt: skip
SANITIZE_FLAGS: dict[str | None, tuple[str, ...]] = {
    None: (),
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-DEMU_ASAN"),
    "thread": ("-fsanitize=thread", "-DEMU_TSAN"),
}
SANITIZER_LIBRARIES = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}


class BuildError(RuntimeError):
    """A compiler failed; the message is its output."""


@functools.cache
def nvcc() -> Path | None:
    """The CUDA compiler: on PATH, under CUDA_HOME, or in /usr/local/cuda."""
    folders = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    found = shutil.which(
        "nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders), "/usr/local/cuda/bin"])
    )
    return Path(found) if found else None


@functools.cache
def cuda_include() -> Path:
    """The folder of cuda_runtime_api.h that belongs to nvcc, which may be a wrapper: nvcc itself says where its toolkit is."""
    dry_run = _run([str(nvcc()), "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull])
    top = next(line.split("TOP=")[1].strip() for line in dry_run.splitlines() if "TOP=" in line)
    for folder in (Path(top) / "include", Path(top) / "targets" / "x86_64-linux" / "include"):
        if (folder / "cuda_runtime_api.h").exists():
            return folder
    raise BuildError(f"no cuda_runtime_api.h under {top}")


@functools.cache
def reasons_against() -> tuple[str, ...]:
    """Why this machine cannot emulate; empty if it can."""
    reasons = []
    if platform.machine() != "x86_64":
        reasons.append(f"emulation is written for x86-64, this is {platform.machine()}")
    elif not {"avx2", "fma", "f16c"} <= set(Path("/proc/cpuinfo").read_text().split()):
        reasons.append("the processor lacks AVX2, FMA or F16C")
    if nvcc() is None:
        reasons.append("no nvcc")
    if shutil.which("g++") is None:
        reasons.append("no g++")
    return tuple(reasons)


def _run(command: Sequence[str]) -> str:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if result.returncode:
        raise BuildError(f"{' '.join(command)}\n{result.stdout[-8000:]}")
    return result.stdout


def _digest(*parts: str | bytes) -> str:
    hasher = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        hasher.update(len(data).to_bytes(8, "little") + data)
    return hasher.hexdigest()[:24]


def cache_folder() -> Path:
    """Where built objects stay: $EXLLAMA_OPS_EMULATION_CACHE, or a folder of this user among the temporary files."""
    named = os.environ.get("EXLLAMA_OPS_EMULATION_CACHE")
    folder = Path(named) if named else Path(tempfile.gettempdir()) / f"exllama_ops_emulation_{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@functools.cache
def _versions() -> str:
    return _run(["g++", "--version"]) + (_run([str(nvcc()), "--version"]) if nvcc() else "")


def _tree(folders: Sequence[Path]) -> Iterator[bytes]:
    """The contents of all sources under `folders`: what a compilation that includes them may depend on."""
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".h", ".cuh", ".cu", ".cpp", ".inl") and path.is_file():
                yield str(path.relative_to(folder)).encode()
                yield path.read_bytes()


def _object(text_or_source: str | Path, flags: Sequence[str], depends: Sequence[bytes]) -> Path:
    """Compiles C++ with g++, unless the cache has it."""
    text = text_or_source if isinstance(text_or_source, str) else text_or_source.read_text()
    out = cache_folder() / f"{_digest(text, *flags, *depends, _versions())}.o"
    if not out.exists():
        with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
            source = Path(folder) / "unit.cpp"
            if isinstance(text_or_source, str):
                source.write_text(text)
            else:
                source = text_or_source
            made = Path(folder) / "unit.o"
            _run(["g++", *flags, "-c", str(source), "-o", str(made)])
            made.replace(out)
    return out


def _translated(text: str, name: str, sanitize: str | None) -> list[Path]:
    flags = ["-O1", *CXX_FLAGS, *SANITIZE_FLAGS[sanitize], f"-I{RUNTIME}"]
    headers = list(_tree([RUNTIME]))
    units = Translation(ptx.parse(text), name).units()
    return [_object(unit.text, flags, headers) for unit in units]


def _runtime_objects(sanitize: str | None) -> list[Path]:
    defines = [flag for flag in SANITIZE_FLAGS[sanitize] if flag.startswith("-D")]
    flags = ["-O2", *CXX_FLAGS, *defines, "-Wall", "-Wextra", "-Werror", f"-I{RUNTIME}", f"-isystem{cuda_include()}"]
    headers = list(_tree([RUNTIME]))
    return [_object(RUNTIME / f"{name}.cpp", flags, headers) for name in ("scheduler", "collectives", "cudart")]


def build(
    sources: Sequence[Path | str] = (),
    *,
    arch: int = 80,
    ptx_files: Sequence[Path | str] = (),
    bindings: Sequence[Path | str] = (),
    include_dirs: Sequence[Path | str] = (),
    system_include_dirs: Sequence[Path | str] = (),
    defines: Sequence[str] = (),
    flags: Sequence[str] = (),
    link: Sequence[str] = (),
    sanitize: str | None = None,
) -> Path:
    """One shared library that runs the kernels of `sources` on the CPU, from the cache if nothing changed.

    Args:
        sources: .cu files, compiled by `nvcc -O3 -lineinfo` for compute_<arch>; their extern "C" functions are exported.
        arch: compute capability, 75, 80, 90, ...
        ptx_files: PTX of other compilers, for `Emulator.launch`.
        bindings: C++ files compiled by g++ alone, such as the registration of torch ops.
        include_dirs: the project's folders; every source file below them is part of the cache's key.
        system_include_dirs: folders of other projects (torch), which are not.
        defines: "NAME" or "NAME=value", for sources and bindings.
        flags: other options of g++ for the bindings.
        link: options of the link, such as -L and -l.
        sanitize: None, "address" (with undefined behaviour) or "thread" (races within and between blocks); such a
            library is loaded in a process that was started with `sanitizer_environment`.

    Raises:
        BuildError: a compiler failed, or the host code calls a CUDA function that the runtime does not have.
        PtxError: an instruction is not supported.
    """
    sources, ptx_files, bindings = ([Path(p).resolve() for p in paths] for paths in (sources, ptx_files, bindings))
    project = [Path(folder).resolve() for folder in include_dirs]
    depends = list(_tree(project)) + [path.read_bytes() for path in (*sources, *ptx_files, *bindings)]
    options = [
        *(f"-D{d}" for d in defines),
        *(f"-I{d}" for d in project),
        *(option for d in system_include_dirs for option in ("-isystem", str(d))),  # nvcc wants two words
    ]
    names = [str(path) for path in (*sources, *ptx_files, *bindings)]
    key = _digest(
        *names,
        str(arch),
        *options,
        *flags,
        *link,
        str(sanitize),
        *depends,
        *_tree([RUNTIME.parent]),
        *_own_sources(),
        _versions(),
    )
    library = cache_folder() / f"{key}.so"
    with _locked(cache_folder() / f"{key}.lock"):
        if library.exists():
            return library
        with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
            # The runtime comes first: objects are initialized in the order of the link, and kernels register with it.
            objects = _runtime_objects(sanitize)
            for index, source in enumerate(sources):
                objects += _compile_cuda(source, Path(folder) / str(index), arch, options, sanitize)
            for path in ptx_files:
                objects += _translated(path.read_text(), str(path), sanitize)
            cuda = f"-isystem{cuda_include()}"
            for path in bindings:
                objects.append(_object(path, ["-O2", "-std=c++17", "-fPIC", *options, *flags, cuda], depends))
            made = Path(folder) / "library.so"
            sanitizers = [flag for flag in SANITIZE_FLAGS[sanitize] if flag.startswith("-fsanitize")]
            _run(["g++", "-shared", "-Wl,-Bsymbolic", *sanitizers, *map(str, objects), *link, "-o", str(made)])
            undefined = _run(["nm", "--dynamic", "--undefined-only", str(made)]).split()
            missing = [name for name in undefined if name.startswith(("cuda", "__cuda", "emu_")) or "3emu" in name]
            if missing:
                raise BuildError(f"the emulated runtime has no {', '.join(missing)}")
            made.replace(library)
    return library


def _own_sources() -> list[bytes]:
    return [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]


def _compile_cuda(source: Path, folder: Path, arch: int, options: Sequence[str], sanitize: str | None) -> list[Path]:
    """nvcc's host object, and the objects of the translated kernels: both of one compilation."""
    folder.mkdir()
    host = folder / "host.o"
    code = f"arch=compute_{arch},code=compute_{arch}"
    _run(
        [str(nvcc()), "-O3", "-std=c++17", "-lineinfo", "-gencode", code, "--keep", "--keep-dir", str(folder),
         "-Xcompiler", "-fPIC", *options, "-c", str(source), "-o", str(host)]
    )  # fmt: skip
    (text,) = folder.glob("*.ptx")
    # Kernels first: their registration comes before that of the host functions that launch them.
    return [*_translated(text.read_text(), str(source), sanitize), host]


def sanitizer_environment(sanitize: str) -> dict[str, str]:
    """The environment in which a process can load a library built with `sanitize`."""
    libraries = [_run(["g++", f"-print-file-name={name}"]).strip() for name in SANITIZER_LIBRARIES[sanitize]]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=0:exitcode=66:report_signal_unsafe=0",
    }
