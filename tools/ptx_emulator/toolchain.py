"""From CUDA sources to a shared library that runs on the CPU.

It holds nvcc's own host objects on the CUDA runtime of runtime/. Beside it, made when it is first launched, lies one
small library for each kernel, translated from nvcc's PTX.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ptx_emulator import arithmetic, machine, ptx  # arithmetic and machine register the instructions
from ptx_emulator.translate import Translation

__all__ = [
    "arithmetic", "build", "compile_kernel", "kernel_names", "machine", "reasons_against", "sanitizer_environment",
    "translate_all",
]  # fmt: skip

RUNTIME = Path(__file__).parent / "runtime"
# -fwrapv: integers of PTX wrap. -ffp-contract: a product and a sum round twice. AVX2, FMA, F16C: fma and _Float16.
CXX_FLAGS = (
    "-std=c++17", "-fPIC", "-fwrapv", "-fno-strict-aliasing", "-ffp-contract=off",
    "-mavx2", "-mfma", "-mf16c", "-g1",
)  # fmt: skip
WARNINGS = ("-Wall", "-Wextra", "-Wshadow", "-Werror")
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
    """The folder of cuda_runtime_api.h; nvcc may be a wrapper, so nvcc itself says where its toolkit is."""
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
    # A process that runs under a sanitizer must not run its compilers under it.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=environment
    )
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
    """Where built objects stay: $PTX_EMULATOR_CACHE, or a folder of this user among the temporary files."""
    named = os.environ.get("PTX_EMULATOR_CACHE")
    folder = Path(named) if named else Path(tempfile.gettempdir()) / f"ptx_emulator_{os.getuid()}"
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


def _contents(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".py", ".h", ".cpp")]


_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


def _with_includes(source: Path, folders: Sequence[Path]) -> list[bytes]:
    """The contents of a source and of every project file that it includes, which are all it may depend on."""
    seen: dict[Path, bytes] = {}
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path not in seen:
            seen[path] = path.read_bytes()
            for name in _INCLUDE.findall(seen[path].decode()):
                waiting += [p for folder in (path.parent, *folders) if (p := (folder / name).resolve()).is_file()]
    return list(seen.values())


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


def _kernel_object(text: str, sanitize: str | None) -> Path:
    flags = ["-O1", *CXX_FLAGS, "-fvisibility=hidden", *SANITIZE_FLAGS[sanitize], f"-I{RUNTIME}"]
    return _object(text, flags, _contents(RUNTIME))


def _sanitizers(sanitize: str | None) -> list[str]:
    return [flag for flag in SANITIZE_FLAGS[sanitize] if flag.startswith("-fsanitize")]


def _runtime_objects(sanitize: str | None) -> list[Path]:
    defines = [flag for flag in SANITIZE_FLAGS[sanitize] if flag.startswith("-D")]
    flags = ["-O2", *CXX_FLAGS, *defines, *WARNINGS, f"-I{RUNTIME}", f"-isystem{cuda_include()}"]
    headers = _contents(RUNTIME)
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
    nvcc_flags: Sequence[str] = (),
    link: Sequence[str] = (),
    sanitize: str | None = None,
) -> Path:
    """One shared library that runs the kernels of `sources` on the CPU, from the cache if nothing changed.

    Kernels are translated and compiled when they are first launched (`compile_kernel`), or checked by `translate_all`.

    Args:
        sources: .cu files, compiled by `nvcc -O3 -lineinfo` for compute_<arch>; extern "C" functions are exported.
        arch: compute capability, 75, 80, 90, ...
        ptx_files: PTX of other compilers, for `Emulator.launch`.
        bindings: C++ files compiled by g++ alone, such as the registration of torch ops.
        include_dirs: the project's folders; files included from them with quotes are part of the cache's key.
        system_include_dirs: folders of other projects (torch), whose files are not.
        defines: "NAME" or "NAME=value", for sources and bindings.
        flags: other options of g++ for the bindings.
        nvcc_flags: other options of nvcc for the sources.
        link: options of the link, such as -L and -l.
        sanitize: None, "address" (with undefined behaviour) or "thread" (races within and between blocks). Such a
            library is loaded in a process that was started with `sanitizer_environment`.

    Raises:
        BuildError: a compiler failed, or the host code calls a CUDA function that the runtime does not have.
    """
    kernels, texts, hosts = ([Path(path).resolve() for path in paths] for paths in (sources, ptx_files, bindings))
    project = [Path(folder).resolve() for folder in include_dirs]
    contents = {path: _with_includes(path, project) for path in (*kernels, *texts, *hosts)}
    options = [
        *(f"-D{d}" for d in defines),
        *(f"-I{d}" for d in project),
        *(option for d in system_include_dirs for option in ("-isystem", str(d))),  # nvcc wants two words
    ]
    kept = [part for path, parts in contents.items() for part in (str(path).encode(), *parts)]
    ours = [*_contents(RUNTIME), *_contents(RUNTIME.parent)]
    key = _digest(str(arch), str(sanitize), *options, *flags, *nvcc_flags, *link, *kept, *ours, _versions())
    library = cache_folder() / f"{key}.so"
    with _locked(library.with_suffix(".lock")):
        if library.exists():
            return library
        with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
            # The runtime comes first: objects are initialized in the order of the link, and all register with it.
            objects = _runtime_objects(sanitize)
            modules = [(path.read_text(), str(path)) for path in texts]
            for source in kernels:
                host, text = _compile_cuda(source, arch, [*options, *nvcc_flags], contents[source])
                objects.append(host)
                modules.append((text, str(source)))
            # Their variables come before the host code that registers them.
            objects[3:3] = [_variables_object(text, path, sanitize) for text, path in modules]
            cuda = f"-isystem{cuda_include()}"
            for path in hosts:
                compiler_flags = ["-O2", "-std=c++17", "-fPIC", *options, *flags, cuda]
                objects.append(_object(path, compiler_flags, contents[path]))
            made = Path(folder) / "library.so"
            _run(
                ["g++", "-shared", "-Wl,-Bsymbolic", *_sanitizers(sanitize), *map(str, objects), *link, "-o", str(made)]
            )
            undefined = _run(["nm", "--dynamic", "--undefined-only", str(made)]).split()
            missing = [name for name in undefined if name.startswith(("cuda", "__cuda", "emu_")) or "3emu" in name]
            if missing:
                raise BuildError(f"the emulated runtime has no {', '.join(missing)}")
            library.with_suffix(".json").write_text(json.dumps({"sanitize": sanitize, "modules": modules}))
            made.replace(library)
    return library


@functools.cache
def _modules(library: Path) -> tuple[str | None, list[tuple[str, str]]]:
    """How the library's kernels are to be sanitized, and the text and name of each of its PTX modules."""
    described = json.loads(library.with_suffix(".json").read_text())
    return described["sanitize"], [(text, path) for text, path in described["modules"]]


@functools.cache
def _module_of_kernel(library: Path) -> dict[str, int]:
    """Which module has a kernel; the first, where a template was instantiated in several."""
    found: dict[str, int] = {}
    for index, (text, _) in enumerate(_modules(library)[1]):
        for name in ptx.entries(text):
            found.setdefault(name, index)
    return found


def kernel_names(library: Path) -> list[str]:
    """All .entry functions of the library."""
    return list(_module_of_kernel(library))


def _translation(text: str, path: str, kernel: str | None) -> Translation:
    return Translation(ptx.parse(ptx.without_entries(text, keep=kernel)), path, _digest(text, path))


def _kernel_text(library: Path, kernel: str) -> str:
    text, path = _modules(library)[1][_module_of_kernel(library)[kernel]]
    return _translation(text, path, kernel).kernel(kernel)


def translate_all(library: Path) -> int:
    """Translates every kernel, and compiles none: how many there are.

    Raises:
        PtxError: an instruction is not supported.
    """
    return sum(1 for kernel in kernel_names(library) if _kernel_text(library, kernel))


def compile_kernel(library: Path, kernel: str) -> Path:
    """The shared library of one kernel, to be loaded beside `library`; from the cache if its PTX has not changed.

    Raises:
        PtxError: an instruction is not supported.
        BuildError: g++ failed.
    """
    sanitize, _ = _modules(library)
    made = library.with_name(f"{library.stem}_{_digest(kernel)}.so")
    with _locked(made.with_suffix(".lock")):
        if not made.exists():
            compiled = _kernel_object(_kernel_text(library, kernel), sanitize)
            with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
                linked = Path(folder) / "kernel.so"
                _run(["g++", "-shared", *_sanitizers(sanitize), str(compiled), str(library), "-o", str(linked)])
                linked.replace(made)
    return made


def _variables_object(text: str, path: str, sanitize: str | None) -> Path:
    flags = ["-O1", *CXX_FLAGS, *SANITIZE_FLAGS[sanitize], f"-I{RUNTIME}"]
    return _object(_translation(text, path, None).variables(), flags, _contents(RUNTIME))


def _compile_cuda(source: Path, arch: int, options: Sequence[str], contents: Sequence[bytes]) -> tuple[Path, str]:
    """nvcc's host object and its PTX, both of one compilation."""
    stem = cache_folder() / _digest(str(source), str(arch), *options, *contents, _versions())
    host, text = stem.with_suffix(".o"), stem.with_suffix(".ptx")
    if not (host.exists() and text.exists()):
        with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
            made = Path(folder) / "host.o"
            code = f"arch=compute_{arch},code=compute_{arch}"
            _run(
                [str(nvcc()), "-O3", "-std=c++17", "-lineinfo", "-gencode", code, "--keep", "--keep-dir", folder,
                 "-Xcompiler", "-fPIC", *options, "-c", str(source), "-o", str(made)]
            )  # fmt: skip
            (kept,) = Path(folder).glob("*.ptx")
            kept.replace(text)
            made.replace(host)
    return host, text.read_text()


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
