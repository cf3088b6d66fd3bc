//! Reads PEM files. Errors name the option and the file, and never quote a file's content: it may be a key.

use std::path::Path;

use tokio_rustls::rustls::pki_types::{
    CertificateDer, PrivateKeyDer,
    pem::{Error, PemObject},
};

use super::refuse;
use crate::store::StoreError;

/// The certificates of a file, at least one.
pub(super) fn certificates(
    option: &'static str,
    file: &Path,
) -> Result<Vec<CertificateDer<'static>>, StoreError> {
    let content = read(option, file)?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&content).collect();
    match certificates {
        Ok(certificates) if certificates.is_empty() => refuse(
            option,
            format!(
                "there is no certificate in {}{}: {}",
                file.display(),
                found(&content),
                "name a PEM file with one"
            ),
        ),
        Ok(certificates) => Ok(certificates),
        Err(error) => damaged(option, file, &error),
    }
}

/// The first private key of a file.
pub(super) fn private_key(option: &'static str, file: &Path) -> Result<PrivateKeyDer<'static>, StoreError> {
    let content = read(option, file)?;
    if has_section(&content, "ENCRYPTED PRIVATE KEY") || has_words(&content, "Proc-Type: 4,ENCRYPTED") {
        let why = format!(
            "the private key in {0} is encrypted, and there is no option for its password: decrypt it with \
             `openssl pkey -in {0}`",
            file.display()
        );
        return refuse(option, why);
    }
    match PrivateKeyDer::from_pem_slice(&content) {
        Ok(key) => Ok(key),
        Err(Error::NoItemsFound) => {
            let found = found(&content);
            refuse(
                option,
                format!("there is no private key in {}{found}: name a PEM file with one", file.display()),
            )
        }
        Err(error) => damaged(option, file, &error),
    }
}

fn read(option: &'static str, file: &Path) -> Result<Vec<u8>, StoreError> {
    std::fs::read(file).or_else(|error| refuse(option, format!("cannot read {}: {error}", file.display())))
}

/// What a file without the wanted section has instead.
fn found(content: &[u8]) -> &'static str {
    match content {
        [] => ", it is empty",
        // The start of a DER sequence.
        [0x30, 0x81..=0x83, ..] => ", it is in DER format, not in PEM",
        _ if has_words(content, "PRIVATE KEY-----") => ", only a private key",
        _ if has_section(content, "CERTIFICATE") => ", only a certificate",
        _ => "",
    }
}

fn has_section(content: &[u8], kind: &str) -> bool {
    has_words(content, &format!("-----BEGIN {kind}-----"))
}

fn has_words(content: &[u8], words: &str) -> bool {
    content.windows(words.len()).any(|window| window == words.as_bytes())
}

fn damaged<T>(option: &'static str, file: &Path, error: &Error) -> Result<T, StoreError> {
    let why = match error {
        Error::MissingSectionEnd { .. } => "a section has no end line",
        Error::IllegalSectionStart { .. } => "a line that begins a section is damaged",
        Error::Base64Decode(_) => "a section is not base64",
        Error::Io(_) | Error::NoItemsFound | Error::SectionTooLarge | _ => "a section is damaged",
    };
    refuse(option, format!("cannot read {} as PEM: {why}", file.display()))
}
