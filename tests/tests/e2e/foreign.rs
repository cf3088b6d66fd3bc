//! Foreign programs: minimal ones, written as object files and attached with `ip` and `tc`.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use aya::{
    Ebpf,
    programs::{
        LinkOrder, SchedClassifier,
        tc::{TcAttachOptions, TcAttachType},
    },
};
use object::{
    Architecture, BinaryFormat, Endianness, SectionKind, SymbolFlags, SymbolKind, SymbolScope,
    write::{Object, Symbol, SymbolSection},
};
use overlay_tests::{netns::Netns, topology::UPLINK};

/// `r0 = 2; exit`: XDP_PASS, as two eBPF instructions of eight bytes (RFC 9669).
const PASS: [u8; 16] = [0xb7, 0, 0, 0, 2, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0];

/// `r0 = TCX_NEXT; exit`.
const NEXT: [u8; 16] = [0xb7, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0x95, 0, 0, 0, 0, 0, 0, 0];

/// `bpf_skb_vlan_push(skb, htons(0x8100), 5); return TC_ACT_OK`: the tag goes where a card's offload has it, beside the bytes.
const TAG: [u8; 40] = [
    0xb7, 2, 0, 0, 0x81, 0, 0, 0, 0xb7, 3, 0, 0, 5, 0, 0, 0, 0x85, 0, 0, 0, 18, 0, 0, 0, 0xb7, 0, 0, 0, 0, 0,
    0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0,
];

/// Drops packets with metadata in front of them that is not zero: with `r1` for the `__sk_buff`, whose `data` is at 76 and whose
/// `data_meta` is at 140 (linux/bpf.h).
const DROP_MARKED: [u8; 80] = [
    0x61, 0x12, 140, 0, 0, 0, 0, 0, // r2 = data_meta
    0x61, 0x13, 76, 0, 0, 0, 0, 0, // r3 = data
    0xb7, 0, 0, 0, 0, 0, 0, 0, // r0 = TC_ACT_OK
    0xbf, 0x24, 0, 0, 0, 0, 0, 0, // r4 = r2
    0x07, 4, 0, 0, 8, 0, 0, 0, // r4 += 8
    0x2d, 0x34, 3, 0, 0, 0, 0, 0, // if r4 > r3: to the end
    0x79, 0x25, 0, 0, 0, 0, 0, 0, // r5 = the metadata
    0x15, 5, 1, 0, 0, 0, 0, 0, // if r5 == 0: to the end
    0xb7, 0, 0, 0, 2, 0, 0, 0, // r0 = TC_ACT_SHOT
    0x95, 0, 0, 0, 0, 0, 0, 0, // exit
];

/// Makes `host` drop packets that arrive on `device` with a mark of XDP.
pub(crate) fn drop_marked(host: &Netns, device: &str, directory: &Path) -> Result<()> {
    filter(host, device, "ingress", &DROP_MARKED, &directory.join("marked.o"))
}

/// Makes `host` send every packet on the underlay with a VLAN tag. [`untag`] ends that.
pub(crate) fn tag(host: &Netns, directory: &Path) -> Result<()> {
    filter(host, UPLINK, "egress", &TAG, &directory.join("tag.o"))
}

/// Attaches a tc program to a device, by way of the object file `path`.
fn filter(host: &Netns, device: &str, direction: &str, program: &[u8], path: &Path) -> Result<()> {
    fs::write(path, object_file("tc", program)?).with_context(|| format!("write {}", path.display()))?;
    host.tool(&format!("tc qdisc add dev {device} clsact"))?;
    host.tool(&format!(
        "tc filter add dev {device} {direction} bpf direct-action object-file {} section tc",
        path.display()
    ))?;
    Ok(())
}

/// Removes what [`tag`] made.
pub(crate) fn untag(host: &Netns) -> Result<()> {
    host.tool(&format!("tc qdisc delete dev {UPLINK} clsact")).map(drop)
}

/// Attaches a foreign XDP program to the underlay device of `host`. The object file is written to `directory`.
pub(crate) fn attach_xdp(host: &Netns, directory: &Path) -> Result<()> {
    let path = directory.join("foreign.o");
    fs::write(&path, object_file("xdp", &PASS)?).with_context(|| format!("write {}", path.display()))?;
    host.tool(&format!("ip link set dev {UPLINK} xdpdrv object {} section xdp", path.display()))?;
    Ok(())
}

/// Attaches a foreign program to the ingress of the underlay device of `host`, with tcx and behind all others, for as long as the value
/// lives. It passes on every packet.
pub(crate) fn attach_tcx(host: &Netns) -> Result<Ebpf> {
    let mut object = Ebpf::load(&object_file("classifier", &NEXT)?).context("load a foreign program")?;
    host.run(|| {
        let program: &mut SchedClassifier =
            object.program_mut("somebody_elses").context("the object has no program")?.try_into()?;
        program.load()?;
        program.attach_with_options(
            UPLINK,
            TcAttachType::Ingress,
            TcAttachOptions::TcxOrder(LinkOrder::last()),
        )?;
        anyhow::Ok(())
    })??;
    Ok(object)
}

fn object_file(section: &str, program: &[u8]) -> Result<Vec<u8>> {
    let mut object = Object::new(BinaryFormat::Elf, Architecture::Bpf, Endianness::Little);
    let code = object.add_section(Vec::new(), section.as_bytes().to_vec(), SectionKind::Text);
    object.append_section_data(code, program, 8);
    let license = object.add_section(Vec::new(), b"license".to_vec(), SectionKind::Data);
    object.append_section_data(license, b"GPL\0", 1);
    object.add_symbol(Symbol {
        name: b"somebody_elses".to_vec(),
        value: 0,
        size: program.len() as u64,
        kind: SymbolKind::Text,
        scope: SymbolScope::Dynamic,
        weak: false,
        section: SymbolSection::Section(code),
        flags: SymbolFlags::None,
    });
    object.write().context("lay out the object file")
}
