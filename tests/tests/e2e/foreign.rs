//! A foreign XDP program: a minimal one, written as an object file and attached with `ip link`.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use object::{
    Architecture, BinaryFormat, Endianness, SectionKind, SymbolFlags, SymbolKind, SymbolScope,
    write::{Object, Symbol, SymbolSection},
};
use overlay_tests::{netns::Netns, topology::UPLINK};

/// `r0 = 2; exit`: XDP_PASS, as two eBPF instructions of eight bytes (RFC 9669).
const PASS: [u8; 16] = [0xb7, 0, 0, 0, 2, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0];

/// Attaches a foreign XDP program to the underlay device of `host`. The object file is written to `directory`.
pub(crate) fn attach_xdp(host: &Netns, directory: &Path) -> Result<()> {
    let path = directory.join("foreign.o");
    let bytes = object_file().context("write an eBPF object")?;
    fs::write(&path, bytes).with_context(|| format!("write {}", path.display()))?;
    host.tool(&format!("ip link set dev {UPLINK} xdpdrv object {} section xdp", path.display()))?;
    Ok(())
}

fn object_file() -> Result<Vec<u8>> {
    let mut object = Object::new(BinaryFormat::Elf, Architecture::Bpf, Endianness::Little);
    let code = object.add_section(Vec::new(), b"xdp".to_vec(), SectionKind::Text);
    object.append_section_data(code, &PASS, 8);
    let license = object.add_section(Vec::new(), b"license".to_vec(), SectionKind::Data);
    object.append_section_data(license, b"GPL\0", 1);
    object.add_symbol(Symbol {
        name: b"somebody_elses".to_vec(),
        value: 0,
        size: PASS.len() as u64,
        kind: SymbolKind::Text,
        scope: SymbolScope::Dynamic,
        weak: false,
        section: SymbolSection::Section(code),
        flags: SymbolFlags::None,
    });
    object.write().context("lay out the object file")
}
