"""How packages are installed on this system: the command a person types."""

from __future__ import annotations

import platform
import sys

SDK = "install the Vulkan SDK: https://vulkan.lunarg.com/sdk/home"
_INSTALL = {
    "debian": "sudo apt install",
    "fedora": "sudo dnf install",
    "arch": "sudo pacman -S",
    "suse": "sudo zypper install",
    "alpine": "sudo apk add",
}
_ALSO = {"ubuntu": "debian", "rhel": "fedora", "termux": "debian"}
_COMPILER = {
    "debian": "build-essential",
    "fedora": "gcc gcc-c++",
    "arch": "base-devel",
    "suse": "gcc gcc-c++",
    "alpine": "build-base linux-headers",
}
_VULKAN = {
    "debian": "glslc libvulkan-dev spirv-headers",
    "fedora": "glslc vulkan-loader-devel vulkan-headers spirv-headers-devel",
    "arch": "shaderc vulkan-headers vulkan-icd-loader spirv-headers",
    "suse": "shaderc vulkan-devel spirv-headers",
    "alpine": "shaderc vulkan-headers vulkan-loader-dev spirv-headers",
}
_VULKAN_DRIVERS = {
    "debian": "mesa-vulkan-drivers vulkan-tools",
    "fedora": "mesa-vulkan-drivers vulkan-tools",
    "arch": "vulkan-radeon vulkan-intel vulkan-tools",
    "suse": "libvulkan_radeon libvulkan_intel vulkan-tools",
    "alpine": "mesa-vulkan-ati mesa-vulkan-intel vulkan-tools",
}
# Only where the distribution itself has them: elsewhere the vendor's own instructions are the way.
_CUDA = {"ubuntu": "nvidia-cuda-toolkit", "arch": "cuda"}


def compiler_remedy() -> str:
    """The command that installs a C++ compiler on this platform."""
    if sys.platform == "darwin":
        return "xcode-select --install"
    if sys.platform == "win32":
        return (
            'install Visual Studio Build Tools with "Desktop development with C++", '
            'then run mesh from its "x64 Native Tools Command Prompt"'
        )
    return _install(_COMPILER) or "install gcc and g++ with your package manager"


def vulkan_remedy() -> str:
    """What brings the headers, the loader and the shader compiler of Vulkan."""
    command = _install(_VULKAN)
    return f"{command}   (or {SDK})" if command else SDK


def vulkan_driver_remedy() -> str:
    """What makes a GPU show up in Vulkan."""
    command = _install(_VULKAN_DRIVERS) or "install your GPU's Vulkan driver"
    return f"{command}   then see whether it is there:  vulkaninfo --summary"


def cuda_remedy() -> str:
    """What brings NVIDIA's compiler and libraries."""
    return _install(_CUDA) or "install the CUDA toolkit: https://developer.nvidia.com/cuda-downloads"


def _install(packages: dict[str, str]) -> str:
    for name in _family():
        for known in (name, _ALSO.get(name, "")):
            if known in packages:
                return f"{_INSTALL[_ALSO.get(known, known)]} {packages[known]}"
    return ""


def _family() -> list[str]:
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return []
    return f"{release.get('ID', '')} {release.get('ID_LIKE', '')}".split()
